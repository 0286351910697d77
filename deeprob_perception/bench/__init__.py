# SPDX-License-Identifier: Apache-2.0
"""What `deeprob bench` measures and writes: engines beside what users would run instead, and the node at several rates.

`engine` measures a model by every candidate (`candidates`, `peers`), each in a process of its own (`remote`), and `limits`
says what the machine could do at best. `rates` finds the highest rate that a node keeps up with. `report` and `plot` write.
"""
