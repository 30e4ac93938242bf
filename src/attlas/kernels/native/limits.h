// limits.h: how much memory this process may take.
//
// A limit of the control group is one of use: what the system can take back does not count against
// it for good. A limit of addresses (RLIMIT_AS, RLIMIT_DATA, strict overcommit) counts whatever is
// held, and an allocation of anyone in the process fails there.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <sys/resource.h>
#include <unistd.h>

namespace attlas {
namespace {

constexpr int64_t NO_LIMIT = INT64_MAX;

// The number that a file holds; NO_LIMIT where there is no file, or it says "max".
inline int64_t number_in(const char* path) {
  char text[64];
  FILE* file = fopen(path, "re");
  if (!file) return NO_LIMIT;
  const bool read = fgets(text, sizeof text, file) != nullptr;
  fclose(file);
  return read && text[0] >= '0' && text[0] <= '9' ? int64_t(strtoll(text, nullptr, 10)) : NO_LIMIT;
}

// The least limit in the files of that name of a group and those that it lies in.
inline int64_t least_of_groups(const char* root, const char* folder, char* group, const char* name) {
  int64_t least = NO_LIMIT;
  for (char* cut = group;; *cut = 0) {
    char path[8192];
    const int length = snprintf(path, sizeof path, "%s%s%s/%s", root, folder, group, name);
    const int64_t limit = length < int(sizeof path) ? number_in(path) : NO_LIMIT;
    if (limit < least) least = limit;
    cut = strrchr(group, '/');
    if (!cut) return least;
  }
}

// Of the control groups of this process, version 2 or 1; in a container, of those that it can see.
inline int64_t group_limit(const char* list = "/proc/self/cgroup", const char* root = "/sys/fs/cgroup") {
  int64_t least = NO_LIMIT;
  char line[4096];
  FILE* file = fopen(list, "re");
  if (!file) return least;
  while (fgets(line, sizeof line, file)) {    // "number:controllers:group"
    line[strcspn(line, "\n")] = 0;
    char* controllers = strchr(line, ':');
    char* group = controllers ? strchr(controllers + 1, ':') : nullptr;
    if (!group) continue;
    *group++ = 0;
    int64_t limit = NO_LIMIT;
    if (!*++controllers) limit = least_of_groups(root, "", group, "memory.max");
    else if (strstr(controllers, "memory")) limit = least_of_groups(root, "/memory", group, "memory.limit_in_bytes");
    if (limit < least) least = limit;
  }
  fclose(file);
  return least;
}

// The memory of the machine, or what its control groups leave this process of it.
inline int64_t memory_limit() {
  static const int64_t limit = [] {
    const int64_t machine = int64_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE), group = group_limit();
    return group < machine ? group : machine;
  }();
  return limit;
}

// Whether addresses that nobody uses can be missing elsewhere. Limits of a process may change.
inline bool counts_addresses() {
  static const bool strict = number_in("/proc/sys/vm/overcommit_memory") == 2;
  for (auto which : {RLIMIT_AS, RLIMIT_DATA}) {
    rlimit limit;
    if (getrlimit(which, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) return true;
  }
  return strict;
}

}  // namespace
}  // namespace attlas
