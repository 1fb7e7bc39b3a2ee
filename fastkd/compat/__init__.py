"""The losses under the names and signatures of other projects, so that a user changes one import line."""
