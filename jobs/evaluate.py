"""`python jobs/evaluate.py --config configs/<experiment>.yaml [key=value ...]`, alone or under `ray job submit`."""

from pema_ray.pema.stages.main import job

if __name__ == "__main__":
    job("evaluate")
