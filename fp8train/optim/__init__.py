"""Optimizers, their states, and learning-rate schedules.

A parameter has a master weight and moments, each stored in a format of its own (``states``; the formats are
in ``unscaled_formats`` and ``scaled_formats``). ``optimizer`` moves them through an update rule of the
package ``update_rules``, in chunks, and ``publishing`` hands the new weights to the model.
"""
