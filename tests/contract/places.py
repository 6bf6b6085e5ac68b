"""What stands for each path parameter but the machine's, where tests go through every route of the contract."""

# A new name gets a line here.
PLACES = {
    "n": "0",
    "slot": "0",
    "level": "1",
    "gpa": "0x0",
    "trace": "tr_0",
    "job": "job_0",
    "name": "paths",
    "code": "vm-busy",
    "cap": "163",
}
