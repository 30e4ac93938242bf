"""attlas: exact attention weights, and any function of them, at fused speed in O(L) memory."""

from . import masks as masks
from . import nn as nn
from . import statistics as statistics
from .attention import AttentionResult as AttentionResult
from .attention import attention as attention
from .attention import attention_statistics as attention_statistics
from .attention import scaled_dot_product_attention as scaled_dot_product_attention
from .flow import flow as flow
from .heads import HeadMean as HeadMean
from .laws import check_statistic as check_statistic
from .memory import empty_cache as empty_cache
from .rollout import rollout as rollout
from .statistics import Statistic as Statistic
from .verify import verify as verify
from .weights import AttentionWeights as AttentionWeights

__version__ = "0.1.0"
