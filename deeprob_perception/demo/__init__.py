# SPDX-License-Identifier: Apache-2.0
"""`deeprob demo`: player, segmentation node and recorder as separate processes over real DDS, then a report.

`run` starts and ends the processes, `recording` reads what they left, `report` shows it.
"""
