def write_page(settings, records):
    raise NotImplementedError
