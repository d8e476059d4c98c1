"""Server optimizers: what the coordinator does with the combined update; one interface.

A new one is a file with a `ServerOptimizer`, its entry here, and its parameters in `fedhds.spec.optimizer`.
"""

from fedhds_server.optimizers.adaptive import Adagrad, Adam, Yogi
from fedhds_server.optimizers.base import ServerOptimizer
from fedhds_server.optimizers.momentum import Momentum
from fedhds_server.optimizers.none import NoOptimizer

OPTIMIZERS: dict[str, ServerOptimizer] = {
    "none": NoOptimizer(),
    "momentum": Momentum(),
    "adagrad": Adagrad(),
    "yogi": Yogi(),
    "adam": Adam(),
}

__all__ = ["OPTIMIZERS", "ServerOptimizer"]
