# SPDX-License-Identifier: Apache-2.0
# Which CUDA toolkit is used, if any, and for which GPUs it compiles. Decided from what nvcc says of itself, before CMake
# tries to compile anything with it; needs no compiler and no project, so tests run it as a script.

set(TD_CUDA_OLDEST 12.4)

# choice: auto, on or off. archs: as in CMAKE_CUDA_ARCHITECTURES, or empty for those of td_default_archs.
# Sets TD_CUDA (ON or OFF) and, where ON, TD_NVCC, TD_CUDA_VERSION and TD_CUDA_ARCHITECTURES. What stands against CUDA
# is a warning under auto and an error under on; no toolkit at all is nothing to warn of.
function(td_choose_cuda choice archs)
  set(TD_CUDA OFF PARENT_SCOPE)
  string(TOLOWER "${choice}" choice)
  if(NOT choice MATCHES "^(auto|on|off)$")
    message(FATAL_ERROR "TALKINGDIT_CUDA: expected auto, on or off, got '${choice}'")
  endif()
  if(choice STREQUAL "off")
    return()
  endif()
  find_program(TD_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(NOT TD_NVCC)
    if(choice STREQUAL "on")
      message(FATAL_ERROR "TALKINGDIT_CUDA=on, but nvcc was not found. Put nvcc on PATH or set CUDA_HOME, "
                          "or build with TALKINGDIT_CUDA=off.")
    endif()
    return()
  endif()
  execute_process(COMMAND "${TD_NVCC}" --version OUTPUT_VARIABLE text ERROR_QUIET RESULT_VARIABLE status)
  set(problem "")
  if(NOT status EQUAL 0 OR NOT text MATCHES "release ([0-9]+\\.[0-9]+)")
    set(problem "${TD_NVCC} does not say its version")
  elseif(CMAKE_MATCH_1 VERSION_LESS TD_CUDA_OLDEST)
    set(problem "CUDA ${CMAKE_MATCH_1} (${TD_NVCC}) is too old, ${TD_CUDA_OLDEST} or newer is needed")
  endif()
  if(problem AND choice STREQUAL "on")
    message(FATAL_ERROR "TALKINGDIT_CUDA=on, but ${problem}.")
  elseif(problem)
    message(WARNING "talkingdit is built for the CPU alone: ${problem}.")
    return()
  endif()
  string(REPLACE " " ";" archs "${archs}")
  if("${archs}" STREQUAL "")
    td_default_archs(${CMAKE_MATCH_1} archs)
  endif()
  set(TD_CUDA ON PARENT_SCOPE)
  set(TD_CUDA_VERSION ${CMAKE_MATCH_1} PARENT_SCOPE)
  set(TD_CUDA_ARCHITECTURES "${archs}" PARENT_SCOPE)
endfunction()

# Are kernels with Hopper-only instructions (cuda/sm90a, which need CUTLASS) built? Yes if Hopper is among the
# architectures. native_archs: what "native" means on this machine, as CMAKE_CUDA_ARCHITECTURES_NATIVE. setup.py asks
# the same.
function(td_builds_sm90a archs native_archs out)
  set(${out} OFF PARENT_SCOPE)
  foreach(arch IN LISTS archs)
    if(arch MATCHES "^native$")
      td_builds_sm90a("${native_archs}" "" found)
      if(found)
        set(${out} ON PARENT_SCOPE)
      endif()
    elseif(arch MATCHES "^(90a?(-real|-virtual)?|all|all-major)$")
      set(${out} ON PARENT_SCOPE)
    endif()
  endforeach()
endfunction()

# Binaries for what data centres and desks have and this toolkit knows, PTX of the last one for what comes later.
# sm_90a is not among them: files that need it get it on their own (td_builds_sm90a).
function(td_default_archs version out)
  if(version VERSION_LESS 12.8)
    set(${out} "80-real;86-real;89-real;90" PARENT_SCOPE)
  else()
    set(${out} "80-real;86-real;89-real;90-real;100-real;120" PARENT_SCOPE)
  endif()
endfunction()
