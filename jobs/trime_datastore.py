"""`python jobs/trime_datastore.py --config configs/trime/<experiment>.yaml [key=value ...]`, or by `ray job submit`."""

from pema_ray.trime.method import TRIME

if __name__ == "__main__":
    TRIME.job("datastore")
