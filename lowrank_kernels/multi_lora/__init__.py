"""Many adapters in one batch over one 4-bit base: ``AdapterBank`` (bank.py), ``Plan`` (plan.py), ``multi_lora_``.

Nothing is imported here: nn.py needs plan.py, and bank.py needs nn.py.
"""
