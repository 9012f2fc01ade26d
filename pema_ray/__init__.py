"""pema-ray: adapt a language model you cannot see, with data its owner cannot see.

The layout says who may know what: `plm_owner` holds the pretrained language model (PLM),
`data_owner` holds the adapter, and `line` is everything that ever passes between the two.
"""

__version__ = "0.1.0"
