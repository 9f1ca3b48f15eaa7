"""The protocol of a comparison in one command: methods on a model, the same seeds, and the table that reviewers ask for.

An extra on top of the package: nothing else imports it. ``kspec-guidance bench`` runs it.
"""
