"""The contract that every reward is held to, check by check; `certificate.py` has the page."""

from flowsteer.rewards.certify.certificate import CHECKS, Certificate, certify

__all__ = ["CHECKS", "Certificate", "certify"]
