"""Every method by name: one line each, and the only registry."""

from potstill.method import Method
from potstill.methods.ab import AB
from potstill.methods.afd_attention import AFDAttention
from potstill.methods.afd_online import AFDOnline
from potstill.methods.aml import AML
from potstill.methods.at import AT
from potstill.methods.crd import CRD
from potstill.methods.dml import DML
from potstill.methods.ensemble_kd import EnsembleKD
from potstill.methods.fitnet import FitNet
from potstill.methods.fsp import FSP
from potstill.methods.jacobian import Jacobian
from potstill.methods.kd import KD
from potstill.methods.kdsvd import KDSVD
from potstill.methods.kdsvdf import KDSVDF
from potstill.methods.l1 import L1
from potstill.methods.l1_kd import L1KD
from potstill.methods.mgd import MGD
from potstill.methods.mhgd import MHGD
from potstill.methods.norm import NORM
from potstill.methods.ofd import OFD
from potstill.methods.one import ONE
from potstill.methods.refilled import REFILLED
from potstill.methods.reviewkd import ReviewKD
from potstill.methods.rkd import RKD
from potstill.methods.sakd import SAKD
from potstill.methods.semckd import SemCKD
from potstill.methods.simkd import SimKD
from potstill.methods.srrl import SRRL
from potstill.methods.vanilla import Vanilla

METHODS: dict[str, type[Method]] = {
    "vanilla": Vanilla,
    "kd": KD,
    "fitnet": FitNet,
    "at": AT,
    "ofd": OFD,
    "rkd": RKD,
    "crd": CRD,
    "reviewkd": ReviewKD,
    "srrl": SRRL,
    "afd_attention": AFDAttention,
    "semckd": SemCKD,
    "simkd": SimKD,
    "mgd": MGD,
    "norm": NORM,
    "sakd": SAKD,
    "fsp": FSP,
    "ab": AB,
    "kdsvd": KDSVD,
    "kdsvdf": KDSVDF,
    "mhgd": MHGD,
    "refilled": REFILLED,
    "aml": AML,
    "jacobian": Jacobian,
    "dml": DML,
    "one": ONE,
    "l1": L1,
    "l1_kd": L1KD,
    "ensemble_kd": EnsembleKD,
    "afd_online": AFDOnline,
}
