"""Training processes of any model under Ray Train. Knows torch, no owner, and of the memory only its atomic files.

`strategies.py` shares the work among processes, `optimizer_state.py` names what they must keep, `schedules.py` says the
learning rate of a step, `checkpoint.py` writes what a resumed run needs, `tracking.py` draws the curves; none of them
imports Ray. Two do: `ray_loop.py` runs the processes, restarts them when they die, and brings back what they refuse;
`ray_checkpoint.py` gives Ray Train copies of checkpoints, and takes them back where a run has lost its own.
"""
