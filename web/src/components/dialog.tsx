import type { ComponentChildren } from "preact";
import { useLayoutEffect, useRef } from "preact/hooks";
import { t } from "../i18n";
import { Icon } from "./icons";

/** A native modal dialog: it traps the focus, and Escape closes it. `side`: a panel at the edge. */
export function Dialog(props: {
  title: string;
  side?: boolean;
  onClose: () => void;
  children: ComponentChildren;
}) {
  const dialog = useRef<HTMLDialogElement>(null);
  const unmounted = useRef(false);
  const pressed = useRef<EventTarget | null>(null);
  useLayoutEffect(() => {
    const { current: element } = dialog;
    element?.showModal();
    // Removing an open dialog without closing it would lose the focus.
    return () => {
      unmounted.current = true;
      element?.close();
    };
  }, []);
  const onBackdropClick = (event: MouseEvent) => {
    // Only if pressed there too: a text selection may end outside the dialog.
    const { current: element } = dialog;
    if (event.target === element && pressed.current === element) props.onClose();
  };
  return (
    <dialog
      ref={dialog}
      class={props.side ? "panel" : "dialog"}
      aria-label={props.title}
      onClose={() => unmounted.current || props.onClose()}
      onPointerDown={(event) => (pressed.current = event.target)}
      onClick={onBackdropClick}
    >
      <div class="dialog-inner">
        <header>
          <h2>{props.title}</h2>
          <button type="button" class="quiet" aria-label={t("close")} onClick={props.onClose}>
            <Icon name="close" />
          </button>
        </header>
        {props.children}
      </div>
    </dialog>
  );
}
