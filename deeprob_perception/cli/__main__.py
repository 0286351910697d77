# SPDX-License-Identifier: Apache-2.0
"""`python -m deeprob_perception.cli`: the command line without the installed script (torchrun needs a module)."""

from deeprob_perception.cli import main

main()
