#!/bin/busybox sh
# The first process of the guest of `make guest-demo`: it shows the kernel's symbols, or tampers with two of its objects.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
if grep -q subpage=symbols /proc/cmdline; then
    echo 0 > /proc/sys/kernel/kptr_restrict
    stty raw -F /dev/ttyS1
    gzip -c -1 /proc/kallsyms > /dev/ttyS1
    poweroff -f
fi
if grep -q subpage=live /proc/cmdline; then
    echo 0 > /proc/sys/kernel/kptr_restrict
    stty raw -echo -F /dev/ttyS1
    gzip -c -1 /proc/kallsyms > /dev/ttyS1
    head -c 1 /dev/ttyS1 > /dev/null # they have been taken
fi
if grep -q subpage=work /proc/cmdline; then
    sync # the mark at which recording starts, as below
    from=$(cut -d' ' -f1 /proc/uptime)
    for round in 1 2; do
        gzip -c /bin/busybox > /work.gz
        gunzip -c /work.gz | sha256sum > /dev/null
        ls -lR /proc/sys | sort > /dev/null
    done
    echo "guest: worked from $from to $(cut -d' ' -f1 /proc/uptime)"
    poweroff -f
fi
sync # the mark at which recording starts
crosses > /crossed &
while [ ! -s /crossed ]; do sleep 1; done
echo /bin/true > /proc/sys/kernel/modprobe
echo '|/bin/false' > /proc/sys/kernel/core_pattern
echo "guest: modprobe is $(cat /proc/sys/kernel/modprobe), core_pattern is $(cat /proc/sys/kernel/core_pattern)"
poweroff -f
