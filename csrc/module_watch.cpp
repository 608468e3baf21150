// SPDX-License-Identifier: Apache-2.0
// Whether module trees are still what they were: ModuleStructure of comet_ds/experts.py, which a
// forward asks about hundreds of modules.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "bindings.h"

namespace comet_ds {
namespace {

namespace py = pybind11;

class ModuleWatch {
  public:
    // `attributes`: the __dict__ of every module.
    explicit ModuleWatch(const std::vector<py::dict>& attributes) {
        for (const py::dict& found : attributes) {
            Module module{.attributes = found, .is_training = found["training"].ptr()};
            for (const char* name : kHooks) module.hooks.push_back(found[name]);
            module.children = found["_modules"];
            for (const auto& [name, child] : module.children) {
                module.children_then.emplace_back(py::reinterpret_borrow<py::object>(child));
            }
            if (found.contains("p")) module.p = found["p"];
            modules_.push_back(std::move(module));
        }
    }

    // Whether no module has hooks or a forward of its own, and all have the children, the mode and
    // the dropout probability that they had.
    bool is_unchanged() const {
        for (const Module& module : modules_) {
            for (const py::object& hooks : module.hooks) {
                if (PyDict_GET_SIZE(hooks.ptr()) != 0) return false;
            }
            PyObject* attributes = module.attributes.ptr();
            if (PyDict_GetItem(attributes, forward_.ptr()) != nullptr) return false;
            if (PyDict_GetItem(attributes, training_.ptr()) != module.is_training) return false;
            if (module.p && PyDict_GetItem(attributes, p_.ptr()) != module.p.ptr()) return false;
            if (!has_same_children(module)) return false;
        }
        return true;
    }

  private:
    static constexpr const char* kHooks[] = {"_forward_hooks", "_forward_pre_hooks",
                                             "_backward_hooks", "_backward_pre_hooks"};

    struct Module {
        py::dict attributes;
        PyObject* is_training;  // True or False
        std::vector<py::object> hooks;
        py::dict children;
        std::vector<py::object> children_then;
        py::object p;
    };

    static bool has_same_children(const Module& module) {
        PyObject *children = module.children.ptr(), *child;
        if (size_t(PyDict_GET_SIZE(children)) != module.children_then.size()) return false;
        Py_ssize_t position = 0;
        for (size_t i = 0; PyDict_Next(children, &position, nullptr, &child); ++i) {
            if (child != module.children_then[i].ptr()) return false;
        }
        return true;
    }

    std::vector<Module> modules_;
    const py::str forward_{"forward"}, training_{"training"}, p_{"p"};
};

}  // namespace

void bind_module_watch(py::module_& m) {
    py::class_<ModuleWatch>(m, "ModuleWatch")
        .def(py::init<const std::vector<py::dict>&>())
        .def("is_unchanged", &ModuleWatch::is_unchanged);
}

}  // namespace comet_ds
