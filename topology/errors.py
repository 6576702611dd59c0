"""What goes wrong between the processes of a group.

TopologyError
├── PortTaken     the address cannot be listened on
├── BadFrame      these bytes are not a frame of this epoch and key
├── Refused       the front does not let this rank in
├── LeaderLost    the front is gone or does not answer
├── MeshFailed    the ranks did not find each other
├── NoDevice      this host has no such device
├── TooManyStages the model has fewer layers than the pipeline has stages
├── BadPlacement  hosts, ranks or devices that make no sense
├── BadSecret     the file that lets processes join is missing, short, or open to others
├── CannotStart   this way of starting ranks cannot work here
└── PlanError     found before anything was started
    ├── BadHostfile   a line of the hostfile, or a filter over it, cannot be used
    ├── BadFleet      the fleet file cannot be used
    ├── BadModel      the model directory does not say what the model needs, or the model cannot be cut that way
    └── DoesNotFit    the hosts, or the memory of their GPUs, do not suffice
"""


class TopologyError(Exception):
    """Root; this folder knows nobody, so hortator.workers turns these into its own errors."""


class PortTaken(TopologyError):
    """The address cannot be listened on."""


class BadFrame(TopologyError):
    """These bytes are not a frame of this epoch and key."""


class Refused(TopologyError):
    """The front does not let this rank in; the text says why."""


class LeaderLost(TopologyError):
    """The front is gone or does not answer."""


class MeshFailed(TopologyError):
    """The ranks did not find each other."""


class NoDevice(TopologyError):
    """This host has no such device."""


class TooManyStages(TopologyError):
    """The model has fewer layers than the pipeline has stages."""


class PlanError(TopologyError):
    """Found before anything was started; the text says where, what is wrong and what to do."""


class BadHostfile(PlanError):
    """A line of the hostfile, or a filter over it, cannot be used."""


class BadFleet(PlanError):
    """The fleet file cannot be used."""


class BadModel(PlanError):
    """The model directory does not say what the model needs, or the model cannot be cut that way."""


class DoesNotFit(PlanError):
    """The hosts, or the memory of their GPUs, do not suffice; the text has the numbers and what would fit."""


class BadPlacement(TopologyError):
    """Hosts, ranks or devices that make no sense; the text says which."""


class BadSecret(TopologyError):
    """The file that lets processes join is missing, short, or open to others."""


class CannotStart(TopologyError):
    """This way of starting ranks cannot work here; the text says what to change."""
