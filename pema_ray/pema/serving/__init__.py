"""Serve applications: the data owner over the PLM owner that `plm` names, and both owners in one."""
