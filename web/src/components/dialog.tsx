import type { ComponentChildren } from "preact";
import { useLayoutEffect, useRef } from "preact/hooks";
import { t } from "../i18n";
import { Icon } from "./icons";

/** A native dialog: it keeps the focus, and Escape closes it. `side` for a panel at the edge. */
export function Dialog(props: {
  title: string;
  side?: boolean;
  onClose: () => void;
  children: ComponentChildren;
}) {
  const dialog = useRef<HTMLDialogElement>(null);
  const gone = useRef(false);
  const pressed = useRef<EventTarget | null>(null);
  useLayoutEffect(() => {
    const { current: element } = dialog;
    element?.showModal();
    // One that is taken away rather than closed would leave the focus nowhere.
    return () => {
      gone.current = true;
      element?.close();
    };
  }, []);
  const beside = (event: MouseEvent) => {
    // Begun there too: who selects text may let go beside the dialog.
    const { current: element } = dialog;
    if (event.target === element && pressed.current === element) props.onClose();
  };
  return (
    <dialog
      ref={dialog}
      class={props.side ? "panel" : "dialog"}
      aria-label={props.title}
      onClose={() => gone.current || props.onClose()}
      onPointerDown={(event) => (pressed.current = event.target)}
      onClick={beside}
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
