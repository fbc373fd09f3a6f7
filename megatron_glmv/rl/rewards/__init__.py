"""What an answer is worth: gates, one verifier a domain, a judge for what rules cannot say.

`Rewarder` (rewarder.py) is what a trainer uses. Nothing here sees torch, Megatron or a process group.
"""
