"""`python jobs/train_adapter.py --config configs/<experiment>.yaml [key=value ...]`, or under `ray job submit`."""

from pema_ray.pema.stages.main import job

if __name__ == "__main__":
    job("train")
