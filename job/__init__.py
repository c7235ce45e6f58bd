"""The job: things are nouns, steps are verbs; docs/architecture.md says who may use whom."""
