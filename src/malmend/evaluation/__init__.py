"""Did it work, and what else moved?"""
