"""`python jobs/trime_mt_train.py --config configs/trime/mt_<run>.yaml [key=value ...]`, or by `ray job submit`."""

from pema_ray.trime.translation.method import TRANSLATION

if __name__ == "__main__":
    TRANSLATION.job("train")
