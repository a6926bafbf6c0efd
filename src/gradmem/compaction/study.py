"""Study."""
def study(entries, text, backbone, prefix):
    return entries
