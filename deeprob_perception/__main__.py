# SPDX-License-Identifier: Apache-2.0
"""`python -m deeprob_perception` is `deeprob`, where no script lies on the PATH (torchrun wants a module)."""

from deeprob_perception.cli import main

main()
