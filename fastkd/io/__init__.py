"""What commands read, print and write: arguments, screens and logs, files, locks, figures. It imports no
other part of the package but errors.
"""
