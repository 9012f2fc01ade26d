"""Training processes of any model under Ray Train. Knows torch, and no owner.

`trainer.py` is the training loop, `strategies.py` exchanges gradients, `optimizer_state.py` names optimiser states,
`schedules.py` computes learning rates, `checkpoint.py` saves what a resumed run needs, `tracking.py` logs curves; none
of them imports Ray. `ray_loop.py` runs the processes under Ray Train, `ray_checkpoint.py` gives it copies of
checkpoints and restores them.
"""
