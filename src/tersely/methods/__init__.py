"""Every compression method, one file each. A new method is one file and one line in METHODS."""

from tersely.methods.cut import CUTS, Importance
from tersely.methods.drop import DROPS, BlockChoice
from tersely.methods.encode.aqlm import AQLM
from tersely.methods.encode.aser import ASER
from tersely.methods.encode.asvd import ASVD
from tersely.methods.encode.bipolar import Bipolar
from tersely.methods.encode.dsnot import DSnoT
from tersely.methods.encode.finequant import FineQuant
from tersely.methods.encode.fp8 import FP8
from tersely.methods.encode.gptq import GPTQ
from tersely.methods.encode.hqq import HQQ
from tersely.methods.encode.llm_int8 import LLMInt8
from tersely.methods.encode.lqer import LQER
from tersely.methods.encode.magnitude import Magnitude
from tersely.methods.encode.mxfp4 import MXFP4
from tersely.methods.encode.nf4 import NF4
from tersely.methods.encode.nvfp4 import NVFP4
from tersely.methods.encode.rtn import RTN
from tersely.methods.encode.shiftaddllm import ShiftAddLLM
from tersely.methods.encode.sparsegpt import SparseGPT
from tersely.methods.encode.squeezellm import SqueezeLLM
from tersely.methods.encode.svd_llm import SVDLLM
from tersely.methods.encode.ternary import TernaryRounding
from tersely.methods.encode.wanda import Wanda
from tersely.methods.protocol import Encode, Rebase, Work
from tersely.methods.rebase.aser_smooth import ASERSmooth
from tersely.methods.rebase.awq import AWQ
from tersely.methods.rebase.rotate import Rotate
from tersely.methods.rebase.smooth import Smooth
from tersely.methods.split import SPLITS, Split
from tersely.methods.trim import TRIMS, TokenChoice
from tersely.methods.tune import TUNES, TuneBlock, TuneModel

__all__ = [
    "CUTS",
    "DROPS",
    "METHODS",
    "REBASES",
    "SPLITS",
    "TRIMS",
    "TUNES",
    "BlockChoice",
    "Encode",
    "Importance",
    "Method",
    "Rebase",
    "Split",
    "TokenChoice",
    "TuneBlock",
    "TuneModel",
    "Work",
]

Method = Encode | Rebase | TuneModel | TuneBlock | Importance | BlockChoice | Split | TokenChoice

METHODS: tuple[type[Encode], ...] = (
    RTN,
    GPTQ,
    ASER,
    LQER,
    LLMInt8,
    FP8,
    MXFP4,
    NVFP4,
    HQQ,
    NF4,
    SqueezeLLM,
    FineQuant,
    ShiftAddLLM,
    Bipolar,
    TernaryRounding,
    AQLM,
    SVDLLM,
    ASVD,
    Magnitude,
    Wanda,
    SparseGPT,
    DSnoT,
)
"""How a weight is stored in fewer bits."""

REBASES: tuple[type[Rebase], ...] = (Smooth, AWQ, ASERSmooth, Rotate)
"""In which basis, before that."""
