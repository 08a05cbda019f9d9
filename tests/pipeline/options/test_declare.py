"""Declarations: bounds, units, and names that are nobody else's."""

from __future__ import annotations

import argparse

from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.options.declare import OPTIONS, KafkaLambdaOptions
from tests.pipeline.options.given import BOUNDS, NUMBERS, arguments_of


def test_every_number_has_bounds() -> None:
    """No number is unbounded, and each one's bounds are tested."""
    assert sorted(BOUNDS) == sorted(NUMBERS)


def test_a_number_with_a_unit_has_it_in_its_name() -> None:
    """Seconds are called so, and every number of them."""
    for name, option in OPTIONS.items():
        assert (option.unit == "seconds") == name.endswith("_secs")


def test_options_do_not_collide_with_beam_s() -> None:
    """No name is Beam's already, so both can be given to a pipeline together."""
    both = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for options in {each.__name__: each for each in PipelineOptions.__subclasses__()}.values():
        if options is not KafkaLambdaOptions and options.__module__.startswith("apache_beam."):
            options._add_argparse_args(both)
    KafkaLambdaOptions._add_argparse_args(both)  # raises at a name that is taken
    assert vars(both.parse_args(["--topics=a", "--runner=b"])).items() >= {
        ("topics", "a"),
        ("runner", "b"),
    }


def test_beam_can_hold_our_options() -> None:
    """A pipeline's options are built from the same declarations."""
    options = PipelineOptions(arguments_of("--include_headers")).view_as(KafkaLambdaOptions)
    assert options.topics == "orders"
    assert options.include_headers == "true"
    assert options.batch_size is None
