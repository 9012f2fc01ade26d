"""`python jobs/pluglm_pretrain.py --config configs/pluglm/<run>.yaml [key=value ...]`, or under `ray job submit`."""

from pema_ray.commands.pluglm import job

if __name__ == "__main__":
    job("pretrain")
