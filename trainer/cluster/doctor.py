"""stub to be replaced"""
def main(argv):
    raise NotImplementedError
