"""Runs Diffusers pipelines on one device, as the supervisor's child process."""
