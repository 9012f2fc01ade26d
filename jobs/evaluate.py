"""`python jobs/evaluate.py --config configs/<experiment>.yaml [key=value ...]`, alone or under `ray job submit`."""

from pema_ray.pema.method import PEMA

if __name__ == "__main__":
    PEMA.job("evaluate")
