"""Serve applications over whichever PLM owner `plm` names, and both owners as one application."""
