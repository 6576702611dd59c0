"""What goes wrong between the processes of a group.

TopologyError
├── PortTaken     the address cannot be listened on
├── BadFrame      these bytes are not a frame of this epoch and key
├── Refused       the front does not let this rank in
├── LeaderLost    the front is gone or does not answer
└── MeshFailed    the ranks did not find each other
"""


class TopologyError(Exception):
    """Root; this folder knows nobody, so hortator.workers turns these into its own errors."""


class PortTaken(TopologyError):  # noqa: N818 - named after what happened, like all errors here
    """The address cannot be listened on."""


class BadFrame(TopologyError):  # noqa: N818
    """These bytes are not a frame of this epoch and key."""


class Refused(TopologyError):  # noqa: N818
    """The front does not let this rank in; the text says why."""


class LeaderLost(TopologyError):  # noqa: N818
    """The front is gone or does not answer."""


class MeshFailed(TopologyError):  # noqa: N818
    """The ranks did not find each other."""


class NoDevice(TopologyError):  # noqa: N818
    """This host has no such device."""
