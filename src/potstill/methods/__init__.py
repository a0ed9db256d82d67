"""Every method by name: one line each, and the only registry."""

from potstill.method import Method
from potstill.methods.at import AT
from potstill.methods.kd import KD
from potstill.methods.vanilla import Vanilla

METHODS: dict[str, type[Method]] = {
    "vanilla": Vanilla,
    "kd": KD,
    "at": AT,
}
