"""Gradual Unrolling over the line: the one decoder, its requests, and the predictors that it mixes with the PLM.

`decoder.py` talks to the PLM owner, `chooser.py` chooses tokens, `offline.py` spreads requests over Ray Data. Knows no
HTTP; only `offline.py` knows Ray.
"""

from pema_ray.data_owner.decoding.decoder import Decoder
from pema_ray.data_owner.decoding.predictor import Predictor, PredictorSpec
from pema_ray.data_owner.decoding.request import (
    Answer,
    Attribution,
    GenerationAborted,
    GenerationRequest,
    SamplingParams,
    Token,
)

__all__ = [
    "Answer",
    "Attribution",
    "Decoder",
    "GenerationAborted",
    "GenerationRequest",
    "Predictor",
    "PredictorSpec",
    "SamplingParams",
    "Token",
]
