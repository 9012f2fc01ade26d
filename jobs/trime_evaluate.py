"""`python jobs/trime_evaluate.py --config configs/trime/<experiment>.yaml [key=value ...]`, or by `ray job submit`."""

from pema_ray.commands.trime import job

if __name__ == "__main__":
    job("evaluate")
