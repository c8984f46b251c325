"""An artefact beside its reference before any score is asked for: structure, weights, rederivation, prompt.

Rule: each stage stands alone, and what is wrong with the artefact is a finding; only a broken reference is an error.
"""
