"""`python jobs/train_prefix.py --config configs/<experiment>.yaml [key=value ...]`, or under `ray job submit`."""

from pema_ray.pema.method import PEMA

if __name__ == "__main__":
    PEMA.job("train_prefix")
