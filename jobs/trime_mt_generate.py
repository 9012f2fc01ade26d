"""`python jobs/trime_mt_generate.py --config configs/trime/mt_<run>.yaml [key=value ...]`, or by `ray job submit`."""

from pema_ray.commands.trime_mt import job

if __name__ == "__main__":
    job("mt-generate")
