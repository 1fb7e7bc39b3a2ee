"""What commands print and write: screens and logs, files, locks, figures. It imports no other part of the
package but errors.
"""
