"""The contract tests over the method of custom_method.py, with two sets of options.

pip install "plait[testing]"
pytest test_custom_method.py
"""

from custom_method import GatedLoraConfig

from plait.testing import contract_test

test_contract = contract_test(GatedLoraConfig, {}, {"gate_start": 0.5})
