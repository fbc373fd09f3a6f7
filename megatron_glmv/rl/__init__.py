"""Reinforcement learning with curriculum sampling: rollouts, rewards, curriculum, and the policy's update."""
