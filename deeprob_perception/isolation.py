# SPDX-License-Identifier: Apache-2.0
"""ROS traffic that no robot nearby sees: what the environment of processes that belong together has to say."""

import os


def isolated() -> dict[str, str]:
    """Return the variables that keep DDS on loopback and in a domain of this process's own.

    Domains up to 101 leave room for their ports on every system (ROS 2, "The ROS_DOMAIN_ID").
    """
    # Humble knows the old variable only, which newer distributions warn of.
    loopback = ("ROS_LOCALHOST_ONLY", "1") if os.environ.get("ROS_DISTRO") == "humble" else (
        "ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")  # fmt: skip
    return dict([loopback, ("ROS_DOMAIN_ID", str(1 + os.getpid() % 101))])
