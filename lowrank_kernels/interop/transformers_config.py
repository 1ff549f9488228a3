"""What transformers is told: ``LowRankConfig`` and ``pretrained_config``. See docs/transformers.md."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..adapter import AdapterSettings, check_adapter_name
from ..codebooks import BITSANDBYTES_CODES, DTYPES, STORAGES, check_blocksize, check_quant_type

METHOD = "lowrank_kernels"
_SAVE_AS = (METHOD, "bitsandbytes")
ADAPTER_FIELDS = (
    "name", "r", "lora_alpha", "lora_dropout", "use_rslora", "dtype", "active", "layers",
)  # fmt: skip


class LowRankConfig(QuantizationConfigMixin):
    """``from_pretrained(path, quantization_config=LowRankConfig())``: linear layers in 4 bits.

    ``quant_type``, ``blocksize``, ``double_quant`` and ``quant_storage`` (a dtype or its name) are
    those of :func:`quantize_4bit`. ``skip_modules`` names what stays dense, as in transformers'
    ``BitsAndBytesConfig``: names from the start or the end, or regular expressions; None stands for
    the output embeddings and whatever the architecture keeps in float32, which a list replaces.
    Tied weights stay dense always. ``save_as`` names the library that ``config.json`` will ask
    for; "bitsandbytes" makes a checkpoint that transformers and bitsandbytes load by themselves,
    of a quant_type that they have.

    Raises ValueError naming the argument. Source: QLoRA (Dettmers et al. 2023).
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        quant_storage: str | torch.dtype = "uint8",
        skip_modules: list[str] | None = None,
        save_as: str = METHOD,
        *,
        quant_method: str = METHOD,
        bitsandbytes: dict[str, Any] | None = None,
        mxfp4: bool = False,
        adapters: list[dict[str, Any]] | None = None,
    ) -> None:
        if quant_method != METHOD:
            raise ValueError(f"quant_method: expected {METHOD!r}, got {quant_method!r}")
        if bitsandbytes is not None:  # the config of such a checkpoint, to be written as it came
            theirs = _checked(bitsandbytes)
            quant_type, double_quant = theirs.bnb_4bit_quant_type, theirs.bnb_4bit_use_double_quant
            quant_storage, skip_modules = (
                theirs.bnb_4bit_quant_storage,
                theirs.llm_int8_skip_modules,
            )
            save_as = "bitsandbytes"
        check_quant_type(quant_type)
        check_blocksize(blocksize)
        if type(double_quant) is not bool:
            raise ValueError(f"double_quant: expected True or False, got {double_quant!r}")
        storage = str(quant_storage).removeprefix("torch.")
        if storage not in STORAGES:
            raise ValueError(
                f"quant_storage: expected one of {list(STORAGES)}, got {quant_storage!r}"
            )
        if skip_modules is not None and not (
            isinstance(skip_modules, list) and all(isinstance(name, str) for name in skip_modules)
        ):
            raise ValueError(f"skip_modules: expected a list of strings, got {skip_modules!r}")
        if save_as not in _SAVE_AS:
            raise ValueError(f"save_as: expected one of {_SAVE_AS}, got {save_as!r}")
        if save_as == "bitsandbytes" and quant_type not in BITSANDBYTES_CODES:
            raise ValueError(
                f"quant_type: expected one of {BITSANDBYTES_CODES} in a checkpoint for bitsandbytes, got {quant_type!r}"
            )
        self.quant_method = METHOD
        self.quant_type, self.blocksize, self.double_quant = quant_type, blocksize, double_quant
        self.quant_storage, self.skip_modules, self.save_as = storage, skip_modules, save_as
        self.bitsandbytes = copy.deepcopy(bitsandbytes)
        self.mxfp4 = bool(mxfp4)  # of a checkpoint whose experts are, until it is loaded
        if adapters is not None:
            check_adapters(adapters)
        self.adapters = adapters  # of a checkpoint that has some: transformers_adapters.py

    @property
    def quantize_args(self) -> tuple:
        """The arguments of :func:`quantize_4bit` after the weight."""
        return self.quant_type, self.blocksize, self.double_quant, STORAGES[self.quant_storage]

    def write_as_bitsandbytes(self, dtype: torch.dtype, skip_modules: list[str]) -> None:
        """From now on :meth:`to_dict` is a ``BitsAndBytesConfig``'s; ``dtype`` is that of the dense modules."""
        self.bitsandbytes = BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=skip_modules,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_quant_storage=STORAGES[self.quant_storage],
        ).to_dict()

    def to_dict(self) -> dict[str, Any]:
        """What goes into ``config.json``: for a bitsandbytes checkpoint, what was there.

        Adapters are nothing that bitsandbytes' loader knows, so with them it is always this library's.
        """
        if self.bitsandbytes is not None:
            theirs = copy.deepcopy(self.bitsandbytes)
            if self.adapters is None:
                return theirs
            return {"quant_method": METHOD, "bitsandbytes": theirs, "adapters": self.adapters}
        fields = copy.deepcopy(self.__dict__)
        return {
            k: v
            for k, v in fields.items()
            if k not in ("bitsandbytes", "mxfp4") and (k, v) != ("adapters", None)
        }


def check_adapters(adapters: object) -> None:
    """Raises ValueError for what transformers_adapters.py cannot have written."""
    if not isinstance(adapters, list):
        raise ValueError(f"adapters: expected a list, got {type(adapters).__name__}")
    for entry in adapters:
        if not isinstance(entry, dict) or entry.keys() != set(ADAPTER_FIELDS):
            raise ValueError(
                f"adapters: expected objects with {', '.join(ADAPTER_FIELDS)}, got {entry!r}"
            )
        names = entry["layers"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"adapters: layers: expected a list of strings, got {names!r}")
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"adapters: dtype: expected one of {list(DTYPES)}, got {entry['dtype']!r}"
            )
        try:
            check_adapter_name(entry["name"])
            AdapterSettings(
                entry["r"], entry["lora_alpha"], entry["lora_dropout"], entry["use_rslora"]
            )
        except ValueError as error:
            raise ValueError(f"adapters: {error}") from None


def _method(quantization_config: object) -> object:
    """Its quant_method, as a string where it is one of transformers' names."""
    if isinstance(quantization_config, QuantizationConfigMixin):
        quantization_config = quantization_config.to_dict()
    method = (
        quantization_config.get("quant_method") if isinstance(quantization_config, dict) else None
    )
    return getattr(method, "value", method)


def _checked(quantization_config: object) -> BitsAndBytesConfig:
    """The config of a 4-bit bitsandbytes checkpoint; ValueError for anything else."""
    if isinstance(quantization_config, QuantizationConfigMixin):
        quantization_config = quantization_config.to_dict()
    if not isinstance(quantization_config, dict):
        raise ValueError(
            f"quantization_config: expected a JSON object, got {type(quantization_config).__name__}"
        )
    method = quantization_config.get("quant_method")
    wanted = "a checkpoint that bitsandbytes or lowrank_kernels quantized to 4 bits"
    # Files of bitsandbytes' first years name no method.
    if method not in ("bitsandbytes", None):
        raise ValueError(f"quantization_config: expected {wanted}, got quant_method {method!r}")
    for bits, expected in (("8", False), ("4", True)):
        if (got := quantization_config.get(f"load_in_{bits}bit", False)) is not expected:
            raise ValueError(
                f"quantization_config: expected {wanted}, got load_in_{bits}bit {got!r}"
            )
    try:
        return BitsAndBytesConfig.from_dict(quantization_config)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"quantization_config: {error}") from None


def pretrained_config(pretrained_model_name_or_path, **kwargs):
    """``AutoConfig.from_pretrained`` for a 4-bit checkpoint of others, to load it with this library.

    That is one of bitsandbytes, or one whose experts are in MXFP4 (GPT-OSS), which keep their values exactly.

    ``from_pretrained(path, config=pretrained_config(path))``. Takes AutoConfig's arguments
    (``revision``, ``local_files_only``, ``trust_remote_code``, ...). The config of a checkpoint
    that names lowrank_kernels already comes back as it is. Raises ValueError for a checkpoint that
    is not quantized, or in another way.
    """
    loaded = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
    config = loaded[0] if isinstance(loaded, tuple) else loaded  # return_unused_kwargs=True
    text = config.get_text_config(decoder=True)
    found = getattr(config, "quantization_config", None) or getattr(
        text, "quantization_config", None
    )
    if found is None:
        raise ValueError(
            f"{pretrained_model_name_or_path}: expected a checkpoint with a quantization_config, got one without; "
            "pass quantization_config=LowRankConfig() to from_pretrained to quantize it"
        )
    if not (isinstance(found, dict) and found.get("quant_method") == METHOD):
        if _method(found) == "mxfp4":
            config.quantization_config = {"quant_method": METHOD, "mxfp4": True}
            return loaded
        LowRankConfig(bitsandbytes=found)  # raises what there is to raise
        config.quantization_config = {"quant_method": METHOD, "bitsandbytes": found}
    return loaded
