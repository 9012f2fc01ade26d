"""`python jobs/pluglm_finetune.py --config configs/pluglm/<run>.yaml [key=value ...]`, or under `ray job submit`."""

from pema_ray.pluglm.method import PLUGLM

if __name__ == "__main__":
    PLUGLM.job("finetune")
