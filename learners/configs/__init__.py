"""Hyper-parameters, a file for each method; `learners.config` has them all."""
